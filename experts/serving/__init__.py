"""Models that leave the package: as files for other runtimes, and as a web service."""
