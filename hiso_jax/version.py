"""The release number, also for a checkout that is not installed."""

VERSION = "0.6.0"
