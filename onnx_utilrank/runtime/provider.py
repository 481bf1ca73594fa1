"""What an execution provider is to this package."""

from dataclasses import dataclass

__all__ = ["Provider"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One execution provider, as it is asked for.

    Attributes:
        key: What users type, as in `--provider cuda`.
        name: ONNX Runtime's name.
        fallback: Providers that may take the nodes this one has no kernel for, in order.
        package: The package of ONNX Runtime that holds it; None where no published one does.
        nvidia: Whether it runs on CUDA devices: tensors can lie there, and the libraries of CUDA
            and cuDNN that other Python packages bring are loaded first.
        brings: Python packages whose import loads further libraries that it needs.
        options: Its options, as ONNX Runtime names them.
        custom_op_libraries: Files of operators of the user's, which every session loads.
    """

    key: str
    name: str
    fallback: tuple[str, ...] = ()
    package: str | None = None
    nvidia: bool = False
    brings: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    custom_op_libraries: tuple[str, ...] = ()

    @property
    def cuda_device(self) -> int | None:
        """Number of the CUDA device that it runs on; None where it runs elsewhere."""
        return int(dict(self.options).get("device_id", 0)) if self.nvidia else None
