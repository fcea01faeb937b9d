"""figures only for now"""
import json
from common import RESULTS
