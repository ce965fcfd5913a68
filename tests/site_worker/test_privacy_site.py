"""A site's part in a private run: its own noise, its line in the ledger, and what a replay finds there."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from nightsplit.shared.config.run import (
    DataSection,
    ModelSection,
    PrivacySection,
    RoundSection,
    RunConfig,
    RunSection,
    TaskSection,
)
from nightsplit.shared.engine.effects import Spend
from nightsplit.shared.errors import RunError
from nightsplit.shared.learning.optimizers import START
from nightsplit.shared.models.networks import mlp
from nightsplit.site_worker import privacy
from nightsplit.site_worker.data.dataset import Dataset, Splits
from nightsplit.site_worker.privacy.accounting import Epsilon, epsilon_of
from nightsplit.site_worker.privacy.site import PrivateTraining, take_part

PRIVACY = PrivacySection(epsilon=2.0, delta=1e-3, clip=1.0)
CONFIG = RunConfig(
    run=RunSection(id="night-1", protocol="fedavg_dp_seg", sites=["mercy"], batch_size=10),
    model=ModelSection(factory="x:y"),
    task=TaskSection(kind="binary"),
    round=RoundSection(rounds=5, local_batches=4),
    privacy=PRIVACY,
    data=DataSection(features=["a", "b", "c"], scaling="none"),
)


def parts_of(count: int) -> Splits:
    generator = torch.Generator().manual_seed(count)
    data = Dataset(torch.randn(count, 3, generator=generator), torch.zeros(count), tuple(map(str, range(count))))
    return Splits(data, data.select([]), data.select([]))


TakePart = Callable[..., PrivateTraining]


@pytest.fixture
def part(tmp_path: Path) -> Iterator[TakePart]:
    """Takes part as a site, by its ledger in a folder; all accounts are closed at the end."""
    with ExitStack() as opened:

        def part(
            count: int = 100, site: str = "mercy", folder: Path = tmp_path, config: RunConfig = CONFIG
        ) -> PrivateTraining:
            torch.manual_seed(0)
            module, ledger = mlp(3, [4], 1), folder / "ledger.db"
            assert config.privacy is not None
            mine = take_part(config, config.privacy, site, parts_of(count), module, "cpu", ledger, None)
            opened.enter_context(closing(mine.account))
            return mine

        yield part


def spent(part: PrivateTraining) -> Epsilon:
    return part.account.ledger.total(CONFIG.run.id).record


def train(part: PrivateTraining, steps: int) -> dict[str, torch.Tensor]:
    for k in range(steps):
        part.trainer.step(*part.batches.batch(k), part.batches.seed("trainer", k), START)
    return part.trainer.weights()


@pytest.mark.parametrize("records", [15, 100, 400])
def test_each_site_has_the_noise_that_its_records_need(part: TakePart, records: int) -> None:
    mine = part(records)
    (entry,) = mine.account.ledger.entries()
    assert (entry.records, entry.use.rate, entry.use.steps) == (records, 10 / records, 0)
    mine.account.pay(Spend(5 * 4))
    assert 1.99 < spent(mine).pld <= 2.0


def test_a_process_that_comes_back_trains_the_same(part: TakePart) -> None:
    first, again = train(part(), 3), train(part(), 3)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_noise_belongs_to_one_secret(part: TakePart, tmp_path: Path) -> None:
    first, other = train(part(folder=tmp_path / "one"), 3), train(part(folder=tmp_path / "two"), 3)
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_a_ledger_serves_one_site(part: TakePart) -> None:
    part()
    with pytest.raises(RunError) as caught:
        part(site="hope")
    assert caught.value.number == 613


def test_other_data_under_the_same_id_is_refused(part: TakePart) -> None:
    part(100)
    with pytest.raises(RunError) as caught:
        part(101)
    assert caught.value.number == 613


def test_the_account_reports_what_is_paid_for(part: TakePart) -> None:
    mine = part()
    assert spent(mine).pld == 0.0
    mine.account.pay(Spend(8))
    (entry,) = mine.account.ledger.entries()
    assert spent(mine) == epsilon_of([entry.use], 1e-3)
    assert entry.use.steps == 8


@pytest.mark.parametrize(("records", "delta"), [(100, 0.0101), (40, 0.9), (1001, 1e-3)])
def test_a_delta_above_one_in_the_records_is_refused(
    part: TakePart, tmp_path: Path, records: int, delta: float
) -> None:
    """C5b of docs/explanation/attacks.md: almost no noise, and a small epsilon. Nothing is entered in the ledger."""
    with pytest.raises(RunError, match=rf"{delta:g}.* 1 / {records} ") as caught:
        part(records, config=replace(CONFIG, privacy=replace(PRIVACY, delta=delta)))
    assert caught.value.number == 616
    assert not (tmp_path / "ledger.db").exists()


def test_a_delta_of_one_in_the_records_is_the_largest(part: TakePart) -> None:
    part(1000)


def test_missing_packages_have_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    privacy.check_installed()
    monkeypatch.setattr(privacy, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="opacus and dp_accounting") as caught:
        privacy.check_installed()
    assert caught.value.number == 614


def test_noise_is_planned_for_every_update_that_a_fast_site_may_send(part: TakePart) -> None:
    """Buffered rounds answer at once: a site alone may fill every buffer."""
    config = replace(CONFIG, round=RoundSection(rounds=5, local_batches=4, close="buffered", reports=3))
    mine = part(config=config)
    mine.account.pay(Spend(5 * 3 * 4))
    assert 1.99 < spent(mine).pld <= 2.0
