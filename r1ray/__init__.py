"""r1ray: one Ray cluster from raw company data to a governed chat endpoint.

Reading order: types, config, registry, model/template, data/schema, train/launcher, engine/protocol, serve/app.
Nothing is imported here: `import r1ray` costs no torch and no ray.
"""

__version__ = "0.1.0"
