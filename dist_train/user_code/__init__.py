"""Code of the user: objects looked up by name, bundles of BK.Synapse, archives unpacked safely."""
