package lint

import (
	"slices"
	"strings"
)

// below says which areas an area may import, besides the packages of its own
// and those leaves of internal that may be imported by everyone.
//
//	cmd ─▶ router ─▶ driver ─▶ volume ─▶ qcow2 ─▶ cache
//	                      └──▶ nbdexport
var below = map[string][]string{
	"cmd":       {"router", "driver", "volume", "nbdexport", "qcow2", "cache", "internal/demo", "internal/imagebackend", "internal/imagefile"},
	"router":    {"driver", "volume", "nbdexport"},                                                    // volume for the form of IDs, nbdexport for the agents of its tests
	"driver":    {"volume", "nbdexport", "qcow2", "cache", "internal/imagebackend", "internal/meter"}, // qcow2 for its errors, cache for its size
	"volume":    {"qcow2", "cache"},
	"nbdexport": {},
	"qcow2":     {"cache"},
	"cache":     {},
	"test":      {"router", "driver", "volume", "nbdexport", "qcow2", "cache", "internal/imagebackend", "internal/imagefile"},
	"bench":     {"driver", "volume", "nbdexport", "qcow2", "cache", "internal/imagebackend", "internal/imagefile"},

	// Adapters: they stand between two areas, so that neither knows the other.
	"internal/imagebackend": {"nbdexport", "qcow2"},
	"internal/meter":        {"nbdexport"},
	"internal/imagefile":    {"qcow2", "cache"},
}

// notLeaves are the packages of internal that know areas, or play the world
// outside. The others are leaves: everyone may import them.
var notLeaves = []string{"internal/demo", "internal/imagebackend", "internal/imagefile", "internal/meter"}

var importsDown = rule{
	name:     "imports down",
	sentence: "imports run downward only: cmd, then router, then driver, then volume and nbdexport; volume, then qcow2, then cache; nbdexport does not know qcow2, and packages of internal know no area unless they are listed as adapters",
	check: func(t *tree, found func(at, what string)) {
		t.eachImport(func(f *file, at, imported string) {
			dir, ours := strings.CutPrefix(imported, module+"/")
			if !ours {
				return
			}
			from, to := f.area(), area(dir)
			switch {
			case from == to, slices.Contains(below[from], to):
			case leaf(to): // whoever may import which test helper is a rule of its own
			case f.test() && from == "internal/qemutest", f.test() && from == "internal/storagetest":
				// the suites of the test helpers run against the real thing
			default:
				found(at, from+" imports "+dir)
			}
		})
	},
}

func leaf(to string) bool {
	return strings.HasPrefix(to, "internal/") && !slices.Contains(notLeaves, to)
}

// outside says which areas may import packages whose path starts so. Packages
// that are not named are free.
var outside = []struct {
	prefix string
	areas  []string
	why    string
}{
	{"github.com/container-storage-interface/", []string{"router", "driver", "test", "internal/demo"}, "CSI is spoken by router and driver, and by its clients test and internal/demo"},
	{"github.com/kubernetes-csi/", []string{"driver", "test"}, "CSI is spoken by driver, and by its clients test and internal/demo"},
	{"google.golang.org/grpc", []string{"router", "driver", "test", "internal/demo"}, "gRPC is spoken by router and driver, and by its clients test and internal/demo"},
	{"github.com/prometheus/", []string{"cmd", "router", "driver", "test"}, "the engine counts; it does not know the format of metrics"},
	{"k8s.io/mount-utils", []string{"driver"}, "only driver mounts"},
	{"k8s.io/client-go", []string{"cmd", "router"}, "the node agent asks nothing of the API server"},
	{"k8s.io/api", []string{"cmd", "router"}, "the node agent asks nothing of the API server"},
	{"k8s.io/klog", []string{"cmd", "router", "driver", "nbdexport"}, "the other packages return errors and count"},
	{"github.com/spf13/", []string{"cmd"}, "flags are read in cmd"},
	{"flag", []string{"cmd", "bench"}, "flags are read in cmd, and in bench, a program of its own"},
	{"log", []string{"cmd"}, "logging goes through klog where it is allowed"},
	{"log/slog", []string{"cmd"}, "logging goes through klog where it is allowed"},
	{"os/exec", []string{"cmd", "driver", "nbdexport", "test", "bench", "internal/aside", "internal/demo", "internal/freezer", "internal/qemutest", "internal/lint"}, "the engine and the pool run no programs"},
}

var importsOutside = rule{
	name:     "imports outside",
	sentence: "some dependencies belong to some packages only, so that one package can be read, or replaced, without the others",
	check: func(t *tree, found func(at, what string)) {
		t.eachImport(func(f *file, at, imported string) {
			for _, o := range outside {
				exact := !strings.Contains(o.prefix, ".")
				if imported != o.prefix && (exact || !strings.HasPrefix(imported, o.prefix)) {
					continue
				}
				if f.test() && (o.prefix == "flag" || o.prefix == "log" || o.prefix == "os/exec") {
					continue // go test -update; examples; oracles and helper processes
				}
				if !slices.Contains(o.areas, f.area()) {
					found(at, f.area()+" imports "+imported+" ("+o.why+")")
				}
			}
		})
	},
}

var testHelpers = rule{
	name:     "test helpers",
	sentence: "packages whose name ends in test are for _test.go files, and for each other",
	check: func(t *tree, found func(at, what string)) {
		isHelper := func(dir string) bool {
			return strings.HasPrefix(dir, module+"/") && strings.HasSuffix(dir, "test")
		}
		t.eachImport(func(f *file, at, imported string) {
			if isHelper(imported) && !f.test() && !isHelper(module+"/"+f.dir()) && f.area() != "test" && f.area() != "bench" {
				found(at, f.dir()+" imports "+imported)
			}
		})
	},
}

// eachImport calls visit for each import of the main module.
func (t *tree) eachImport(visit func(f *file, at, imported string)) {
	t.goFiles(func(f *file) {
		for _, spec := range f.ast.Imports {
			visit(f, t.at(spec.Pos()), strings.Trim(spec.Path.Value, `"`))
		}
	})
}
