"""A worker that waits."""

from nightsplit.shared.engine.patience import PAUSE_S_MAX, PAUSE_S_MIN, Patience


def test_pauses_double_up_to_an_hour_and_begin_anew_after_work():
    now = 0.0
    patience = Patience(lambda: now)
    assert not patience.is_over(worked=False)
    over = []
    for second in range(1, 20_000):
        now = float(second)
        if patience.is_over(worked=False):
            over.append(second)
    pauses = [later - earlier for earlier, later in zip([0, *over], over, strict=False)]
    assert pauses[:4] == [PAUSE_S_MIN, 2 * PAUSE_S_MIN, 4 * PAUSE_S_MIN, 8 * PAUSE_S_MIN]
    assert max(pauses) == pauses[-1] == PAUSE_S_MAX
    assert not patience.is_over(worked=True)
    now += PAUSE_S_MIN - 1
    assert not patience.is_over(worked=False)
    now += 1
    assert patience.is_over(worked=False)
