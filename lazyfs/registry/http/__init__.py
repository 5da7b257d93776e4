"""HTTP to one registry: requests, logins, TLS, limits, and the Repository that is made of them."""
