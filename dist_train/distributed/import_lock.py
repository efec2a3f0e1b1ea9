"""A lock that keeps forks apart from imports in threads.

A process that is forked while a thread imports a module inherits the interpreter's lock of that module, which nobody
releases there: it would wait for ever where it imports the module itself.
"""

import threading

IMPORT_LOCK = threading.Lock()  # held during such an import, and during a fork
