"""The sweeps of a consensus and the descent to the least error: when they end, and how far they step."""

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

FIRST_SWEEPS = 2
"""The sweeps towards the consensus from which that descent begins."""

FIRST_STEP = 0.5
"""Half of the step that would be right if all clients moved alike. Where each moves by itself, N times that is right."""

SHORTER_STEP, LONGER_STEP = 0.1, 1000.0
"""The factors by which a step may at most become shorter or longer than the one before."""

UNBOUNDED_STEP = 4.0
"""The factor by which a step becomes longer where the parabola through the errors has no minimum."""

ERROR_ROUNDING_SQUARED = 1e-15
"""Rounding of a squared error, relative to the squared update.

A bend of the parabola below it is rounding. A step along which the error falls then becomes ``LONGER_STEP`` times longer,
until it is so long that it shows the bend. Squared errors below it are left. Where clients differ by 1e-3 of their factors,
errors end 2 % lower by this rule.
"""
