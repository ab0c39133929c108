"""Second moments streamed while logging, and what is computed from them: Kronecker factors and their eigenbases."""
