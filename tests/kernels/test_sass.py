"""The reader of assembly counts what one iteration of the main loop executes."""

from sass import loops, main_loop

# A loop with a branch that is seldom taken, in which another loop loads and stores, as in the one-pass kernel.
NESTED = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x800] ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0050*/                   LDG.E.128 R12, desc[UR4][R6.64] ;
        /*0060*/                   STG.E.128 desc[UR4][R6.64], R12 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   MUFU.EX2 R4, R4 ;
        /*0090*/              @!P2 MUFU.EX2 R5, R5 ;
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00b0*/               @P3 BRA `(.L_x_0) ;
        /*00c0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   BRA `(.L_x_3);
"""


def test_a_branch_that_is_seldom_taken_does_not_count():
    loop = main_loop(NESTED)
    assert len(loop.instructions) == 8
    assert loop.count("MUFU") == 2 and loop.count("BAR") == 1 and loop.count("LDG") == 2
    assert loop.bytes_of("LDG") == 32 and loop.bytes_of("STG") == 8 and loop.bytes_of_block() == 32


def test_every_loop_is_found():
    assert sorted(len(loop.instructions) for loop in loops(NESTED)) == [1, 3, 8]


def test_an_end_within_a_loop_is_no_way_round_it():
    text = NESTED.replace("@!P2 MUFU.EX2 R5, R5", "EXIT")
    assert sorted(len(loop.instructions) for loop in loops(text)) == [1, 3]
