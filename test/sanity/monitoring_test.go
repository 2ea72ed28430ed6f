package sanity

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"csi-qcow2/router"
)

const monitoring = "../../deploy/monitoring"

// TestMonitoring lets a real Prometheus scrape a real node with volumes in use,
// and evaluate every expression of the alerts and of the dashboard.
func TestMonitoring(t *testing.T) {
	for _, tool := range []string{"prometheus", "promtool"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v; install Debian's package prometheus", err)
		}
	}
	for _, args := range [][]string{{"check", "rules", "alerts.yaml"}, {"test", "rules", "alerts_test.yaml"}} {
		cmd := exec.Command("promtool", args...)
		cmd.Dir = monitoring
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}

	p := newProcess(t)
	node := freeAddress(t)
	p.args = []string{"--metrics-address", node, "--overcommit", "1000", "--logging-format", "json", "--verbosity", "4"}
	p.start()
	k := newKubelet(p)
	source := k.useNew("source", "ext4")
	writeFile(t, k.target("source")+"/f", []byte("before"))
	k.snapshot("snap", source)
	k.unuse("source", source)
	k.use("source", source, "ext4") // the node looks at the space of snapshots after a stage
	writeFile(t, k.target("source")+"/f", []byte("after"))
	staged := time.Now()
	p.wait("the space of the snapshot", func() bool {
		if strings.Contains(scrape(t, node), "\ncsi_qcow2_snapshot_unique_bytes") {
			return true
		}
		if time.Since(staged) > 30*time.Second { // a look that takes too long is given up until the next stage
			k.unuse("source", source)
			k.use("source", source, "ext4")
			staged = time.Now()
		}
		return false
	})
	if got := get(t, "http://"+node+"/healthz"); got != "ok\n" {
		t.Errorf("/healthz says %q", got)
	}

	controller := serveController(t)
	db := startPrometheus(t, p, node, controller)
	known := names(scrape(t, node) + scrape(t, controller))
	maps.DeleteFunc(known, func(name string, _ bool) bool { return !strings.HasPrefix(name, "csi_qcow2_") })
	asked := make(map[string]bool)
	for where, expr := range expressions(t, db) {
		for _, name := range regexp.MustCompile(`csi_qcow2_[a-z_]+`).FindAllString(expr, -1) {
			asked[name] = true
			if !known[name] {
				t.Errorf("%s: no scrape has %s", where, name)
			}
		}
		query(t, db, where, expr)
	}
	if len(asked) < 25 {
		t.Errorf("alerts and dashboard ask for %d metrics only: %v", len(asked), slices.Sorted(maps.Keys(asked)))
	}
	k.unuse("source", source)
	if err := p.signal(syscall.SIGTERM); err != nil {
		t.Errorf("SIGTERM: %v", err)
	}
	p.wantNothingLeft()
	wantJSON(t, p.log.String())
}

// wantJSON checks that each line of a log is an object with a message.
func wantJSON(t *testing.T, log string) {
	t.Helper()
	lines := 0
	for line := range strings.Lines(log) {
		var entry struct {
			Time, Level, Msg string
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Time == "" || entry.Level == "" || entry.Msg == "" {
			t.Errorf("a line of the log is no JSON: %v, %s", err, line)
		}
		lines++
	}
	if lines < 10 {
		t.Errorf("%d lines of log", lines)
	}
}

// freeAddress returns a TCP address that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v\n%s", url, resp.Status, err, b)
	}
	return string(b)
}

func scrape(t *testing.T, address string) string {
	t.Helper()
	return get(t, "http://"+address+"/metrics")
}

// names returns the names of all series of a scrape.
func names(text string) map[string]bool {
	all := make(map[string]bool)
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "#") {
			all[regexp.MustCompile(`^[a-zA-Z0-9_:]*`).FindString(line)] = true
		}
	}
	return all
}

// serveController serves the metrics of a router that has made calls. The
// controller itself needs an API server.
func serveController(t *testing.T) string {
	t.Helper()
	m := router.NewMetrics()
	m.Observe("/csi.v1.Controller/DeleteVolume", "a", nil, time.Millisecond)
	m.Observe("/csi.v1.Controller/DeleteVolume", "b", errors.New("x"), time.Second)
	registry := prometheus.NewRegistry()
	registry.MustRegister(m)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: promhttp.HandlerFor(registry, promhttp.HandlerOpts{})}
	go s.Serve(l) // ends when s is closed
	t.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

// startPrometheus starts Prometheus with our alerts, and returns its address
// when it has scraped both targets.
func startPrometheus(t *testing.T, p *process, targets ...string) string {
	t.Helper()
	alerts, err := filepath.Abs(filepath.Join(monitoring, "alerts.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "prometheus.yml")
	text := fmt.Sprintf(`
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%q]
scrape_configs:
  - job_name: csi-qcow2
    static_configs: [{targets: [%s]}]
`, alerts, strings.Join(targets, ", "))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	address := freeAddress(t)
	var log lockedBuffer
	cmd := exec.Command("prometheus", "--config.file="+config, "--storage.tsdb.path="+t.TempDir(), "--web.listen-address="+address)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("prometheus: %s", log.String())
		}
	})
	p.wait("Prometheus to have scraped all", func() bool {
		resp, err := http.Get("http://" + address + "/api/v1/query?query=" + url.QueryEscape("sum(up)"))
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return strings.Contains(string(b), fmt.Sprintf(`"%d"]`, len(targets)))
	})
	p.wait("Prometheus to have evaluated the alerts", func() bool {
		return !strings.Contains(get(t, "http://"+address+"/api/v1/rules"), `"health":"unknown"`)
	})
	return address
}

// expressions returns all expressions, by where they stand: those of the
// alerts as Prometheus has loaded them, and those of the dashboard.
func expressions(t *testing.T, db string) map[string]string {
	t.Helper()
	all := make(map[string]string)
	var rules struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Name, Query, Health, LastError string }
			}
		}
	}
	decode(t, get(t, "http://"+db+"/api/v1/rules"), &rules)
	for _, g := range rules.Data.Groups {
		for _, r := range g.Rules {
			all["alert "+r.Name] = r.Query
			if r.Health != "ok" {
				t.Errorf("alert %s is %s: %s", r.Name, r.Health, r.LastError)
			}
		}
	}
	if len(all) < 10 {
		t.Errorf("%d alerts were loaded", len(all))
	}
	text, err := os.ReadFile(filepath.Join(monitoring, "dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Title, UID    string
		SchemaVersion int
		Templating    struct {
			List []struct{ Name, Type, Definition string }
		}
		Panels []struct {
			ID          int
			Type, Title string
			GridPos     struct{ X, Y, W, H int }
			Targets     []struct{ RefID, Expr string }
			FieldConfig struct{ Defaults struct{ Unit string } }
		}
	}
	decode(t, string(text), &board)
	if board.Title == "" || board.UID == "" || board.SchemaVersion < 30 {
		t.Errorf("the dashboard is %q %q of schema %d", board.Title, board.UID, board.SchemaVersion)
	}
	variables := map[string]string{"__rate_interval": "5m"}
	for _, v := range board.Templating.List {
		variables[v.Name] = ".*"
		if m := regexp.MustCompile(`^label_values\((\w+), (\w+)\)$`).FindStringSubmatch(v.Definition); m != nil {
			all["variable "+v.Name] = m[1]
		} else if v.Type == "query" {
			t.Errorf("variable %s is %q", v.Name, v.Definition)
		}
	}
	ids := make(map[int]bool)
	for _, panel := range board.Panels {
		if ids[panel.ID] || panel.Title == "" || panel.GridPos.W == 0 || panel.GridPos.X+panel.GridPos.W > 24 {
			t.Errorf("panel %d %q is at %+v, or there are two", panel.ID, panel.Title, panel.GridPos)
		}
		ids[panel.ID] = true
		if panel.Type != "row" && (len(panel.Targets) == 0 || panel.FieldConfig.Defaults.Unit == "") {
			t.Errorf("panel %q has no target or no unit", panel.Title)
		}
		for _, target := range panel.Targets {
			expr := os.Expand(target.Expr, func(name string) string {
				value, ok := variables[name]
				if !ok {
					t.Errorf("panel %q uses $%s, which is not there", panel.Title, name)
				}
				return value
			})
			all["panel "+panel.Title+" "+target.RefID] = expr
		}
	}
	if len(all) < 40 {
		t.Errorf("%d expressions in all", len(all))
	}
	return all
}

func decode(t *testing.T, text string, to any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), to); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
}

// query evaluates an expression.
func query(t *testing.T, db, where, expr string) {
	t.Helper()
	resp, err := http.PostForm("http://"+db+"/api/v1/query", url.Values{"query": {expr}})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(b), `"status":"success"`) {
		t.Errorf("%s: %s: %v, %s", where, expr, err, b)
	}
}
