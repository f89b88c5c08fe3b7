"""The Hugging Face client's downloader on one URL: `python -m bench.peers.hf_get URL FILE SIZE ["Name: value" ...]`.

Its own function for a file of known size over HTTP, with its own retries; it compares sizes, no hash.
"""

from __future__ import annotations

import sys

from huggingface_hub.file_download import http_get
from huggingface_hub.utils import disable_progress_bars

if __name__ == "__main__":
    url, name, size, *fields = sys.argv[1:]
    disable_progress_bars()
    with open(name, "wb") as file:
        http_get(url, file, headers=dict(field.split(": ", 1) for field in fields), expected_size=int(size))
