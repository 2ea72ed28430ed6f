package router

import (
	"path"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/status"
)

// Metrics count the calls to agents.
type Metrics struct {
	calls *prometheus.CounterVec
	took  *prometheus.HistogramVec
}

// NewMetrics returns Metrics; Observe counts.
func NewMetrics() *Metrics {
	return &Metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "csi_qcow2_router_calls_total", Help: "Calls to node agents that have ended."}, []string{"method", "code", "node"}),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "csi_qcow2_router_call_duration_seconds", Help: "Time of calls to node agents.",
			Buckets: []float64{.005, .025, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}}, []string{"method"}),
	}
}

// Observe is an Observe.
func (m *Metrics) Observe(method, node string, err error, took time.Duration) {
	method = path.Base(method)
	m.calls.WithLabelValues(method, status.Code(err).String(), node).Inc()
	m.took.WithLabelValues(method).Observe(took.Seconds())
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(to chan<- *prometheus.Desc) {
	m.calls.Describe(to)
	m.took.Describe(to)
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(to chan<- prometheus.Metric) {
	m.calls.Collect(to)
	m.took.Collect(to)
}
