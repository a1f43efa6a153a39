"""The dry run before a launch: measured on a GPU or traced without one, judged, and learned from."""

import sftplan

sftplan.make_callable(__name__)
