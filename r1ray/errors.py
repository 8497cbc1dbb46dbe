"""Every exception that r1ray raises for a user's mistake or a failed outside system.

    R1RayError
    ├── ConfigError
    │   ├── UnknownKey              a key that no config field has; names the nearest one
    │   └── InvalidValue            a value outside its limits, a file that is no YAML, a malformed override
    ├── ClusterError
    │   ├── ClusterUnreachable      no Ray cluster answers at the address
    │   ├── ClusterTooSmall         the request can never be placed; names the missing bundle
    │   ├── PortInUse               another process listens where a server should
    │   └── HomeNotShared           a node that has another directory at the path of R1RAY_HOME
    ├── RegistryError
    │   ├── ModelNotFound           no registered model of that name
    │   ├── VersionNotFound         the model has no such version or alias
    │   ├── ArtifactInvalid         a directory that is incomplete, altered or of the wrong kind
    │   └── PromotionRefused        the gate said no, or was not asked where it must be; names the failed checks
    ├── ModelError
    │   ├── UnsupportedModel        not a causal LM that r1ray can load
    │   ├── TemplateMismatch        another chat template than the one the artifact was trained with
    │   ├── TemplateNotTrainable    a chat template that does not say which tokens are the assistant's
    │   └── AdapterMismatch         the adapter belongs to another base model
    ├── DataError
    │   ├── UnknownFormat           neither the extension nor the content says what the file is
    │   ├── WrongEncoding           text that is not UTF-8; names the encoding it seems to have
    │   ├── MissingColumn           a table without the columns its format needs
    │   ├── TooManyBadRows          more invalid rows than the configured share
    │   └── NothingToTrain          no row, or no token that carries loss
    ├── TrainingError
    │   ├── CheckpointCorrupt       a checkpoint that cannot be read; names the last good one
    │   ├── DiskFull                no room to write; says how much is wanted
    │   ├── OutOfMemory             a worker's memory is too small; says what was tried
    │   └── RunInUse                another job trains this very run; says which
    ├── EngineError
    │   ├── PromptTooLong           prompt (and wanted tokens) exceed the context
    │   ├── QueueFull               no room for another request; retry later
    │   ├── UnknownAdapter          the replica has not loaded that adapter
    │   ├── InvalidRequest          an empty prompt, an id outside the vocabulary, a request id in use
    │   ├── GenerationFailed        the model gave no usable logits for one request
    │   ├── DeadlineExceeded        a request was not done in the time it gave itself
    │   └── EngineStopped           the engine died or was shut down while the request ran
    ├── EvaluationError             an evaluation set or task that cannot be scored
    ├── CompressionError            a smaller model that cannot be made, or that answers too differently
    ├── TuningError                 a search that cannot run or has no finished trial
    ├── RetrievalError
    │   └── CollectionNotFound      no index of that name
    └── ServingError                a deployment that cannot be composed from its configuration
        └── ServerUnreachable       no OpenAI endpoint answers at the URL, or it refuses

Each takes one sentence: what is wrong, the value, the limit, what to do. One positional argument keeps them picklable,
so that they cross Ray's process boundaries unchanged.
"""

__all__ = [
    "AdapterMismatch",
    "ArtifactInvalid",
    "CheckpointCorrupt",
    "ClusterError",
    "ClusterTooSmall",
    "ClusterUnreachable",
    "CollectionNotFound",
    "CompressionError",
    "ConfigError",
    "DataError",
    "DeadlineExceeded",
    "DiskFull",
    "EngineError",
    "EngineStopped",
    "EvaluationError",
    "GenerationFailed",
    "HomeNotShared",
    "InvalidRequest",
    "InvalidValue",
    "MissingColumn",
    "ModelError",
    "ModelNotFound",
    "NothingToTrain",
    "OutOfMemory",
    "PortInUse",
    "PromotionRefused",
    "PromptTooLong",
    "QueueFull",
    "R1RayError",
    "RegistryError",
    "RetrievalError",
    "RunInUse",
    "ServerUnreachable",
    "ServingError",
    "TemplateMismatch",
    "TemplateNotTrainable",
    "TooManyBadRows",
    "TrainingError",
    "TuningError",
    "UnknownAdapter",
    "UnknownFormat",
    "UnknownKey",
    "UnsupportedModel",
    "VersionNotFound",
    "WrongEncoding",
]


class R1RayError(Exception):
    """Base of all: `except R1RayError` catches what a user can mend."""


class ConfigError(R1RayError): ...


class UnknownKey(ConfigError): ...


class InvalidValue(ConfigError): ...


class ClusterError(R1RayError): ...


class ClusterUnreachable(ClusterError): ...


class ClusterTooSmall(ClusterError): ...


class PortInUse(ClusterError): ...


class HomeNotShared(ClusterError): ...


class RegistryError(R1RayError): ...


class ModelNotFound(RegistryError): ...


class VersionNotFound(RegistryError): ...


class ArtifactInvalid(RegistryError): ...


class PromotionRefused(RegistryError): ...


class ModelError(R1RayError): ...


class UnsupportedModel(ModelError): ...


class TemplateMismatch(ModelError): ...


class TemplateNotTrainable(ModelError): ...


class AdapterMismatch(ModelError): ...


class DataError(R1RayError): ...


class UnknownFormat(DataError): ...


class WrongEncoding(DataError): ...


class MissingColumn(DataError): ...


class TooManyBadRows(DataError): ...


class NothingToTrain(DataError): ...


class TrainingError(R1RayError): ...


class CheckpointCorrupt(TrainingError): ...


class DiskFull(TrainingError): ...


class OutOfMemory(TrainingError): ...


class RunInUse(TrainingError): ...


class EngineError(R1RayError): ...


class PromptTooLong(EngineError): ...


class QueueFull(EngineError): ...


class UnknownAdapter(EngineError): ...


class InvalidRequest(EngineError): ...


class GenerationFailed(EngineError): ...


class DeadlineExceeded(EngineError): ...


class EngineStopped(EngineError): ...


class EvaluationError(R1RayError): ...


class CompressionError(R1RayError): ...


class TuningError(R1RayError): ...


class RetrievalError(R1RayError): ...


class CollectionNotFound(RetrievalError): ...


class ServingError(R1RayError): ...


class ServerUnreachable(ServingError): ...
