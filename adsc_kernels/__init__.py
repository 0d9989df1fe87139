from .plan import CompressionPlan, StagePlan, make_plan
from .schedule import Boundary, CompressionSchedule
