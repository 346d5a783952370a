//! The CPU refuses indices outside of tables, and names them; a GPU, which cannot look, makes their rows NaN
//! (`tests/gpu/indices.rs`).

use crate::machine::{floats, indices};
use crate::rejections::{Pool, refused};
use paceline_kernels::Call;

#[test]
fn indices_outside_of_tables() {
    let pool = Pool::new();
    let (table, out) = (floats(&[1.0; 10]), pool.at(0, 6));
    let tokens = indices(&[0, 5, 4]);
    let call =
        Call::Embedding { tokens: tokens.view(), table: table.view(), positions: None, out, rows: 3, cols: 2, seq: 3 };
    refused(call, &["tokens[1] is 5", "below 5"]);
    let positions = pool.at(100, 4);
    let call = Call::Embedding {
        tokens: tokens.view(),
        table: table.view(),
        positions: Some(positions),
        out,
        rows: 3,
        cols: 2,
        seq: 3,
    };
    refused(call, &["positions has 4", "3 rows of 2"]);
    let call = Call::HeadLoss {
        x: pool.at(0, 6),
        weight: table.view(),
        targets: tokens.view(),
        lse: pool.at(100, 3),
        loss: pool.at(200, 1),
        scratch: pool.at(300, 24),
        rows: 3,
        cols: 2,
        vocab: 5,
        chunk: 3,
    };
    refused(call, &["targets[1] is 5", "below 5"]);
}
