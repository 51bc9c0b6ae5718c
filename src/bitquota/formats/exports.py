"""The former name of ``bitquota.exports.export``."""

from bitquota.exports.export import *  # noqa: F403
