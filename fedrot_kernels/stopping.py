"""When the iterations over clients end: the sweeps of a consensus, and the descent to the least error."""

CONSENSUS = 1e-7
"""Estimated gain of all sweeps to come, relative to the clients' spread, at which their consensus is reached."""

CONSENSUS_SWEEPS = 200
"""The most sweeps over all clients. Clients near a common reference take two or three, noise twice the signal 10 to 60."""

SLOWEST = 0.999
"""Upper bound of the factor by which each sweep is taken to move less than the one before."""

OTHERS = 0.99
"""How much of a client's own part is taken out of the mean that it is turned towards.

With all of it nothing would be left to turn a client towards whose weight is 1 or that is alone, but rounding.
"""

LEAST_ERROR = 1e-8
"""What the next step of the descent to the least error would gain, relative to the squared error, at which it ends."""

LEAST_ERROR_STEPS = 30
"""The most steps of that descent. Clients near a common reference take five; noise as large as the signal takes them all."""
