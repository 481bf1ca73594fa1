"""The engine that an option names."""

from onnx_utilrank.engine.engine import IN_PLACE, Engine
from onnx_utilrank.errors import ConfigError
from onnx_utilrank.runtime.provider import Provider

__all__ = ["find_engine"]


def find_engine(name: str, provider: Provider) -> Engine:
    """The engine of a name, if it can be had.

    Args:
        name: 'local', 'ray', or 'ray:' and the address of the head of a cluster.
        provider: Where models run.

    Raises:
        ConfigError: Ray is not installed, the address is none, or a GPU is named by its number.
        EngineUnavailableError: The cluster does not answer.
    """
    if name == "local":
        return IN_PLACE
    if any(key == "device_id" for key, _ in provider.options):
        raise ConfigError(
            "engine ray: gives each worker a GPU, so that device_id is not for you to say"
        )
    # It takes a second to import, and not everybody has it.
    from onnx_utilrank.engine.ray import RayEngine

    _, _, address = name.partition(":")
    return RayEngine(address or None, gpus=provider.nvidia)
