//! `--redraw` on records of this version and of earlier ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use hyperattn_bench::csv;

/// As it was written before METHOD_REFINED could be measured.
const WITHOUT_REFINED: &str = "\
list,line,group,implementation,isa,method,mask,dtype_q,dtype_k,dtype_v,dtype_out,layout,batch,heads_q,heads_kv,n_q,n_k,\
head_dim,threads,min_seq_len,block_size,sample_size,residual,runs,time_ms,time_low_ms,time_high_ms,gflops,peak,peak_gflops,\
fraction_of_peak,ratio,ratio_low,ratio_high,keys_per_query,error,error_rows,workspace_bytes,peak_bytes,added_bytes,waiting
old,2,1,hyperattn,avx512,paper,none,f32,f32,f32,f32,bhsd,1,1,1,32768,32768,64,1,4096,256,256,uniform,30,36.639,36.062,\
36.923,7502.4,f32 fma avx512,210.74,0.55626,1,1,1,512,10.759,256,744000,37797888,794624,2.3659e-4
old,2,2,hyperattn,avx512,paper,none,f32,f32,f32,f32,bhsd,1,1,1,65536,65536,64,1,4096,256,256,uniform,30,73.278,72.1,\
74.0,15005,f32 fma avx512,210.74,0.55626,1,1,1,512,15.2,256,744000,37797888,794624,
old,3,2,torch 2.15.0,,exact,none,f32,f32,f32,f32,bhsd,1,1,1,65536,65536,64,1,4096,256,256,uniform,3,9000,9000,9000,122,\
f32 fma avx512,210.74,0.58,122.8,122.8,122.8,65536,,,,,,
";

fn redrawn(record: &Path, pictures: &Path) -> String {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_hyperattn-bench"));
    let run = bench.arg("--redraw").arg(record).arg("--plot").arg(pictures).output().expect("it starts");
    let errors = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{}: {errors}", record.display());
    String::from_utf8(run.stdout).expect("text")
}

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("hyperattn-bench-{}-{name}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    folder
}

#[test]
fn records_without_the_columns_of_refined_are_drawn() {
    let folder = folder("old");
    let record = folder.join("old.csv");
    fs::write(&record, WITHOUT_REFINED).expect("the record is written");
    let text = redrawn(&record, &folder);
    assert!(text.contains("paper none f32 n32768 d64 h1 t1"), "{text}");
    assert!(text.contains("time grows as n^1.000 from n = 32768 to 65536"), "{text}");
    let picture = fs::read_to_string(folder.join("old-time.svg")).expect("the picture is drawn");
    assert!(picture.contains("slope 1.00"));
    fs::remove_dir_all(&folder).expect("it can be removed");
}

#[test]
fn every_record_of_this_folder_is_drawn() {
    let folder = folder("kept");
    let machines = Path::new(env!("CARGO_MANIFEST_DIR")).join("records");
    let mut count = 0;
    for machine in fs::read_dir(machines).expect("the folder is there") {
        let machine = machine.expect("an entry").path();
        if !machine.is_dir() {
            continue;
        }
        for record in fs::read_dir(machine).expect("a folder") {
            let record = record.expect("a file").path();
            if record.extension().is_none_or(|extension| extension != "csv") {
                continue;
            }
            let lines = csv::parse(&fs::read_to_string(&record).expect("text")).expect("legal").len();
            let text = redrawn(&record, &folder);
            let rows = text.lines().filter(|line| line.contains('%')).count();
            assert_eq!(rows, lines, "{}", record.display());
            count += 1;
        }
    }
    assert!(count > 0, "there is no record");
    fs::remove_dir_all(&folder).expect("it can be removed");
}
