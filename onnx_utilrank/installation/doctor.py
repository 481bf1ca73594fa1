"""Find out what is wrong with an installation.

Nothing that may be broken is imported here: what is loaded to see whether it works is loaded in
processes of their own.
"""

import importlib.metadata

from onnx_utilrank.errors import ConfigError
from onnx_utilrank.installation.packages import DISTRIBUTION, optional_extras, required_packages
from onnx_utilrank.installation.report import DoctorReport
from onnx_utilrank.runtime.machine import look_at_machine
from onnx_utilrank.runtime.packages import runtime_packages
from onnx_utilrank.runtime.trial import ProviderTrial, try_providers, try_runtime

__all__ = ["doctor"]

SUFFIX = "ExecutionProvider"


def doctor(provider: str = "cpu") -> DoctorReport:
    """Look at the installation: versions, execution providers, processor and memory.

    Args:
        provider: The execution provider that has to work, as `find_provider` takes it.

    Raises:
        ConfigError: ONNX Runtime knows no provider of that name.
    """
    packages, owners, runtime = required_packages(), runtime_packages(), try_runtime()
    asked = _short(provider)
    if runtime.fault is None and asked not in map(_short, (*runtime.known, *runtime.built)):
        offered = ", ".join(map(_short, runtime.built))
        raise ConfigError(f"provider {provider!r} is not known; this ONNX Runtime has: {offered}")
    if runtime.fault is None:
        others = (name for name in map(_short, runtime.built) if name != asked)
        providers = try_providers([asked, *others])
    else:
        fault = f"ONNX Runtime cannot be loaded: {runtime.fault}"
        providers = (ProviderTrial(provider=asked, fault=fault),)
    faults = [f"{state.name}: {state.fault}." for state in packages if state.fault]
    if len(owners) > 1:
        faults.append(
            f"The packages {' and '.join(owners)} are installed at once and overwrite each other's "
            f"files: pip uninstall {' '.join(owners)}, then install the one that is wanted."
        )
    if providers[0].fault:
        faults.append(f"Provider {asked}: {providers[0].fault}.")
    return DoctorReport(
        version=importlib.metadata.version(DISTRIBUTION),
        machine=look_at_machine(),
        packages=packages,
        extras=optional_extras(),
        runtime_packages=owners,
        providers=providers,
        not_built=tuple(_short(name) for name in runtime.known if name not in runtime.built),
        asked=asked,
        faults=tuple(faults),
    )


def _short(name: str) -> str:
    return name.lower().removesuffix(SUFFIX.lower())
