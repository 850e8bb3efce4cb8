from lightning_kd.seeding import derive_seed, run_seed


def test_seeds_differ_by_every_part_and_fit_a_generator():
    seeds = {derive_seed(s, name, k) for s in range(5) for name in ("a", "b") for k in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Parts do not run together: ("1", 2) is not (12,).
    assert len({derive_seed("1", 2), derive_seed("12"), derive_seed(1, 2), derive_seed(12)}) == 4


def test_the_run_seed_is_lightnings(monkeypatch):
    assert run_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert run_seed() == 17
