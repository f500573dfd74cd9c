use super::Task;
pub fn ceiling(_task: &Task) -> (f64, usize) {
    (1.0, 0)
}
