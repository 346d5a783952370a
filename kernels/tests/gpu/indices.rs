//! Indices outside of tables make their rows NaN and touch nothing else.

use crate::machine::{floats, indices, poisoned, run};
use paceline_kernels::Call;

#[test]
fn tokens_outside_of_the_table_show_in_their_rows_alone() {
    let (table, tokens, out) = (floats(&[1.0; 10]), indices(&[0, 5, 4]), poisoned(6));
    let positions = None;
    run(Call::Embedding {
        tokens: tokens.view(),
        table: table.view(),
        positions,
        out: out.view(),
        rows: 3,
        cols: 2,
        seq: 3,
    });
    assert_eq!(out.values().iter().map(|x| x.is_nan()).collect::<Vec<_>>(), [false, false, true, true, false, false]);
    let (d_out, d_table) = (floats(&[1.0; 6]), floats(&[0.0; 10]));
    run(Call::EmbeddingBackward {
        tokens: tokens.view(),
        d_out: d_out.view(),
        d_table: d_table.view(),
        d_positions: None,
        rows: 3,
        cols: 2,
        seq: 3,
    });
    assert_eq!(d_table.values(), [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
}

#[test]
fn targets_outside_of_the_vocabulary_make_the_loss_nan() {
    let (x, weight, targets) = (floats(&[0.5; 6]), floats(&[1.0; 10]), indices(&[0, 5, 4]));
    let (lse, loss, scratch) = (poisoned(3), poisoned(1), poisoned(24));
    run(Call::HeadLoss {
        x: x.view(),
        weight: weight.view(),
        targets: targets.view(),
        lse: lse.view(),
        loss: loss.view(),
        scratch: scratch.view(),
        rows: 3,
        cols: 2,
        vocab: 5,
        chunk: 3,
    });
    assert!(loss.values()[0].is_nan());
    assert!(lse.values().iter().all(|x| x.is_finite()));
}
