"""SGLang's platform for a CPU with torch alone, without a kernel package and without graphs."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sgl_apr.server.constants import CPU_ATTENTION_BACKEND


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]  # SGLang has no types
    """An out-of-tree platform, because SGLang's own CPU platform needs a kernel package that no registry has."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return CPU_ATTENTION_BACKEND

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False

    def get_graph_runner_cls(self) -> None:
        return None
