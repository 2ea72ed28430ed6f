package driver

import (
	"context"
	"path"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"csi-qcow2/internal/meter"
)

// metricsPrefix begins the name of every metric of this program.
const metricsPrefix = "csi_qcow2_"

// callBuckets are the bounds of the time of RPCs, in seconds: sidecars give up after 10.
var callBuckets = []float64{.005, .025, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}

// metrics count the RPCs of a driver.
type metrics struct {
	calls *prometheus.CounterVec
	took  *prometheus.HistogramVec
	look  chan struct{} // wakes SampleUsage; holds one
}

func newMetrics() *metrics {
	return &metrics{
		look: make(chan struct{}, 1),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: metricsPrefix + "csi_calls_total", Help: "CSI calls that have ended."}, []string{"method", "code"}),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: metricsPrefix + "csi_call_duration_seconds", Help: "Time of CSI calls.", Buckets: callBuckets}, []string{"method"}),
	}
}

// count is an interceptor that counts each RPC with the code that leaves.
func (m *metrics) count(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	begin := time.Now()
	resp, err := handler(ctx, req)
	method := path.Base(info.FullMethod)
	m.calls.WithLabelValues(method, status.Code(err).String()).Inc()
	m.took.WithLabelValues(method).Observe(time.Since(begin).Seconds())
	return resp, err
}

// meterOf returns the meter of the volume id, which is being staged: the same
// for as long as it is, whatever happens to its device.
func (d *Driver) meterOf(id string) *meter.Meter {
	select {
	case d.metrics.look <- struct{}{}:
	default: // it is to look already
	}
	m, _ := d.meters.LoadOrStore(id, new(meter.Meter))
	return m.(*meter.Meter)
}

// Metrics returns a collector of all that is known of this node: its RPCs, its
// pools, and the volumes that are staged.
func (d *Driver) Metrics() prometheus.Collector { return collector{d} }

// collector implements prometheus.Collector over a Driver.
type collector struct{ d *Driver }

// Describe implements prometheus.Collector.
func (c collector) Describe(to chan<- *prometheus.Desc) {
	c.d.metrics.calls.Describe(to)
	c.d.metrics.took.Describe(to)
	for _, desc := range allDescs {
		to <- desc
	}
}

// Collect implements prometheus.Collector. A pool that does not answer costs
// five seconds at most, and has no figures but that it is down.
func (c collector) Collect(to chan<- prometheus.Metric) {
	c.d.metrics.calls.Collect(to)
	c.d.metrics.took.Collect(to)
	for _, name := range c.d.pools.names {
		c.d.collectPool(to, name)
	}
	for _, v := range c.d.stagedVolumes() {
		c.d.collectVolume(to, v)
	}
}

// allDescs are the descriptions of all metrics that Collect makes itself.
var allDescs []*prometheus.Desc

// desc describes a metric.
func desc(name, help string, labels ...string) *prometheus.Desc {
	d := prometheus.NewDesc(metricsPrefix+name, help, labels, nil)
	allDescs = append(allDescs, d)
	return d
}

// gauge and counter send one figure.
func gauge[T int | int64 | uint64 | float64](to chan<- prometheus.Metric, d *prometheus.Desc, value T, labels ...string) {
	to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(value), labels...)
}

func counter[T uint64 | float64](to chan<- prometheus.Metric, d *prometheus.Desc, value T, labels ...string) {
	to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(value), labels...)
}
