"""The version, where it can be read without asking the installation: that takes longer than planning."""

VERSION = "0.1.0"
