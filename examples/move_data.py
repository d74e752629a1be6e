"""Rent a server, send it a script, run that, and bring the results home.

export CLORE_API_KEY=...
python move_data.py SCRIPT RESULTS [GPU_TYPE]

SCRIPT is a shell script; what it leaves in the folder "results" comes back as RESULTS.
"""

import sys

from clore_client import CloreClient


def main(script: str, results: str, gpu_type: str = "RTX 4090") -> None:
    with CloreClient() as client, client.rent(gpu_type, max_hours=1) as rental:
        rental.run("mkdir -p results")
        rental.upload(script, "job.sh")
        rental.run("sh job.sh", on_output=print, timeout=1800)
        print(rental.download("results/", results, resume=True))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
