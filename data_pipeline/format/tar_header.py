"""Tar headers whose damage is an error: tarfile alone takes a damaged header for the end of the archive."""

from __future__ import annotations

import tarfile
from typing import Self


class CheckedHeader(tarfile.TarInfo):
    """A member's header, for `tarfile.open(..., tarinfo=CheckedHeader)`.

    tarfile takes a damaged, cut or missing header after the first member as the archive's end; this raises
    tarfile.ReadError, which names the byte.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        place = tar.offset
        try:
            return super().fromtarfile(tar)
        except tarfile.EmptyHeaderError:
            raise tarfile.ReadError(f"neither a member nor the end of the archive at byte {place}") from None
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(f"the header at byte {place}: {error}") from None
