"""The laws a kernel must obey, one after another, and the domains that are enumerated whole."""
