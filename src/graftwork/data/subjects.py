"""Which area of the standard library a module belongs to: our own grouping, after its reference's chapters.

Modules that serve every area (typing, abc, warnings, contextlib) or none (antigravity) have no subject: their
docstrings are part of the text for language modelling, not of the classification.
"""

from __future__ import annotations

_MODULES = {
    "text and markup": """
        string re difflib textwrap stringprep html xml _markupbase json csv configparser tomllib plistlib
        gettext locale codecs encodings quopri base64 uu email mailcap tokenize shlex netrc _strptime""",
    "data types and numbers": """
        datetime calendar collections _collections_abc heapq bisect weakref _weakrefset types copy pprint
        reprlib enum graphlib zoneinfo numbers decimal _pydecimal fractions random statistics functools
        operator dataclasses colorsys secrets hashlib hmac uuid""",
    "files and storage": """
        pathlib os posixpath ntpath genericpath nturl2path fileinput stat filecmp tempfile glob fnmatch
        linecache shutil pickle copyreg shelve dbm sqlite3 gzip bz2 lzma _compression zipfile tarfile
        _pyio io mailbox wave aifc sunau chunk sndhdr imghdr xdrlib""",
    "concurrency": """
        threading _threading_local multiprocessing concurrent subprocess _bootsubprocess sched queue
        asyncio selectors signal contextvars asynchat asyncore pty""",
    "networking": """
        socket ssl socketserver http urllib ftplib poplib imaplib smtplib smtpd nntplib telnetlib xmlrpc
        ipaddress mimetypes webbrowser wsgiref cgi cgitb""",
    "interfaces": """
        tkinter turtle curses cmd argparse getopt optparse getpass readline rlcompleter tty""",
    "development and language": """
        unittest doctest pdb bdb profile cProfile pstats timeit trace tracemalloc pydoc distutils venv
        zipapp importlib zipimport imp pkgutil modulefinder runpy ast symtable tabnanny pyclbr py_compile
        compileall dis opcode pickletools inspect traceback code codeop site sysconfig token keyword""",
}

SUBJECT_OF: dict[str, str] = {
    module: subject for subject, modules in _MODULES.items() for module in modules.split()
}
SUBJECTS = tuple(sorted(_MODULES))
