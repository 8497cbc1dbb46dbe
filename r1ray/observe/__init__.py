"""Measures, never decides: experiment tracking now; metrics, cost, alerts, audit and forecast get their room here."""
