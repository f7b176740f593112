import gc
import weakref

from qscore.programs import KEPT
from qscore.train_host import _compiled_uniform


def test_a_process_lets_go_of_the_programs_it_has_done_with():
    sizes = range(40, 40 + KEPT + 1)
    programs = [weakref.ref(_compiled_uniform(1, size)) for size in sizes]
    gc.collect()
    assert [program() is None for program in programs] == [True] + [False] * KEPT
    assert _compiled_uniform(1, sizes[-1]) is programs[-1]()
