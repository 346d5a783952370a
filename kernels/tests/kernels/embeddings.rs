use crate::machine::{Array, Random, assert_close, floats, indices, poisoned, run};
use paceline_kernels::Call;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if crate::PATIENT { 32 } else { 8 }))]
    #[test]
    fn rows_of_tables_and_their_gradients(
        sequences in 1u32..4,
        seq in 1u32..9,
        longer in 0u32..3,
        cols in 1u32..70,
        vocab in 1u32..12,
        with_positions: bool,
        seed: u64,
    ) {
        let mut random = Random(seed);
        let (rows, c) = (sequences * seq, cols as usize);
        let tokens = random.indices(rows as usize, vocab);
        let table = random.floats(vocab as usize * c, 1.0);
        let positions = random.floats((seq + longer) as usize * c, 1.0);
        let (token_array, table_array, position_array) = (indices(&tokens), floats(&table), floats(&positions));
        let out = poisoned(rows as usize * c);
        run(Call::Embedding {
            tokens: token_array.view(),
            table: table_array.view(),
            positions: with_positions.then(|| position_array.view()),
            out: out.view(),
            rows,
            cols,
            seq,
        });
        let at = |row: usize, col: usize| (tokens[row] as usize * c + col, row % seq as usize * c + col);
        let expected: Vec<f64> = (0..rows as usize * c)
            .map(|i| at(i / c, i % c))
            .map(|(token, position)| table[token] + if with_positions { positions[position] } else { 0.0 })
            .collect();
        assert_close("out", &out, &expected, 1e-7);

        let d_out = random.floats(rows as usize * c, 1.0);
        let (d_out_array, d_table) = (floats(&d_out), floats(&table));
        let d_positions = with_positions.then(|| floats(&positions));
        run(Call::EmbeddingBackward {
            tokens: token_array.view(),
            d_out: d_out_array.view(),
            d_table: d_table.view(),
            d_positions: d_positions.as_ref().map(Array::view),
            rows,
            cols,
            seq,
        });
        let (mut expected_table, mut expected_positions) = (table, positions);
        for (i, d) in d_out.iter().enumerate() {
            let (token, position) = at(i / c, i % c);
            expected_table[token] += d;
            expected_positions[position] += d;
        }
        assert_close("d_table", &d_table, &expected_table, 1e-5);
        if let Some(d_positions) = d_positions {
            assert_close("d_positions", &d_positions, &expected_positions, 1e-5);
        }
    }
}
