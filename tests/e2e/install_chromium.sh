#!/bin/sh
# The viewer's tests drive a real browser. Installs Debian's where there is none and we may; otherwise those tests are skipped.
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "Installing chromium for the viewer's tests …"
    { apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 || echo "chromium could not be installed; the viewer's tests will be skipped."
fi
exit 0
