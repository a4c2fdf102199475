"""The release, known to a checkout that is not installed, too."""

VERSION = "0.4.0"
