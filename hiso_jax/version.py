"""The release number, also for a checkout that is not installed."""

VERSION = "0.5.0"
