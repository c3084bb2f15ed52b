"""Files: atomic writes, downloads, hashes, and where a result came from.

The lowest room: it knows nothing of cells. A file that is there is whole; a download gets its name when its checksum
fits; a hash of code covers the definitions that run, without comments and docstrings.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "atomic": ["replacing", "reporting_full", "write_json", "write_text"],
        "cache": ["cached"],
        "downloads": ["download"],
        "hashing": ["mix", "name_seeds"],
        "places": ["CHECKOUT", "PACKAGE", "RESOURCES"],
        "plugins": ["load_plugins"],
        "provenance": ["code_hash", "directory_hash", "environment"],
    },
)
