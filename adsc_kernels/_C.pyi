from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    cxx_flags: str
    torch: str
    cuda_compiler: str | None
    cuda_archs: tuple[str, ...] | None
    cuda_reason: str | None

def build_info() -> BuildInfo: ...
