"""Files by URI: local paths, object stores and http(s), with bounded retries."""
