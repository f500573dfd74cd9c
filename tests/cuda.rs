//! Every kernel against the float64 path of the CPU, where there is a GPU: what `selectivbench doctor` runs.

use selectivbench::check::{Plan, Route, run};
use selectivbench::device::{gpu_count, parse_device};

#[test]
fn a_gpu_computes_what_the_cpu_computes() {
    if gpu_count() == 0 {
        println!("skipped: no GPU in this machine");
        return;
    }
    let device = parse_device("cuda:0").expect("a GPU that can be used");
    let plan =
        Plan { device: &device, routes: &Route::ALL, thorough: false, poison: true, wanted: &|_| true };
    let complaints: Vec<String> = run(&plan).iter().flat_map(|checked| checked.complaints()).collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
