"""Makes WARC files as a crawler would write them out of directories of HTML pages, to try curation on where there is no crawl.

    python benchmarks/make_crawl.py --html /usr/share/doc --target crawl --pages-per-file 500 --again 0.05

`--again` is the share of pages that are crawled twice, under the same URL and a later date. Needs the package warcio.
"""

import argparse
import io
import random
from pathlib import Path

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", required=True, nargs="+", help="directories; all pages below them are taken")
    parser.add_argument("--target", required=True, help="a directory")
    parser.add_argument("--pages-per-file", type=int, default=500)
    parser.add_argument("--again", type=float, default=0.05)
    args = parser.parse_args()
    target, chance = Path(args.target), random.Random(0)
    target.mkdir(parents=True, exist_ok=True)
    pages = [(page, f"http://{Path(root).name}.example.org/{page.relative_to(root)}") for root in args.html for page in sorted(Path(root).rglob("*.html"))]
    crawled = [(page, url, 0) for page, url in pages] + [(page, url, 1) for page, url in pages if chance.random() < args.again]
    for first in range(0, len(crawled), args.pages_per_file):
        with (target / f"{first // args.pages_per_file:05d}.warc.gz").open("wb") as file:
            writer = WARCWriter(file, gzip=True)
            for page, url, visit in crawled[first : first + args.pages_per_file]:
                headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
                date = {"WARC-Date": f"202{visit}-01-01T00:00:00Z"}
                writer.write_record(writer.create_warc_record(url, "response", io.BytesIO(page.read_bytes()), http_headers=headers, warc_headers_dict=date))
    print(f"{len(crawled):,} pages, {len(pages):,} of them different, in {target}")


if __name__ == "__main__":
    main()
