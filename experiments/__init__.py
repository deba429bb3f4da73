"""Jobs, studies and benchmarks built on lorax, which never imports from here."""
