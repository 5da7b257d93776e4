"""OCI distribution and OCI layout directories behind one Protocol: synchronous, thread-safe, every wait bounded."""
