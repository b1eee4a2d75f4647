"""Models that leave the package: as files for other runtimes."""

from experts.serving.export import FORMATS, Exported, ExportError, Source, export, load_exported

__all__ = ["FORMATS", "ExportError", "Exported", "Source", "export", "load_exported"]
