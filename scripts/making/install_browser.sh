#!/bin/sh
# Installs what the browser tests of the report need: Chromium with its driver (Debian packages) and
# axe-core, the accessibility checker (npm), in .browser/. Does nothing for what is there already.
set -eu
cd "$(dirname "$0")/../.."

AXE=4.14.1

if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
  as_root=""
  [ "$(id -u)" = 0 ] || as_root=sudo
  $as_root apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends \
    chromium chromium-driver fonts-noto-core >/dev/null
fi

if [ ! -f .browser/node_modules/axe-core/axe.min.js ]; then
  mkdir -p .browser
  npm install --prefix .browser --no-save --no-package-lock --no-audit --no-fund --silent \
    "axe-core@$AXE"
fi
