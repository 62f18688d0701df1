// Package bench measures the real binary, as separate processes, the way
// docs/performance.md tells of it: CPU per operation of the process that does
// the work, latency as its client sees it, and ratios to the machine's raw
// cryptography taken in the same run.
package bench

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hallmark-id/hallmark/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

// cpu returns the CPU time that a process has used, all threads, user and
// system: fields 14 and 15 of /proc/PID/stat, in ticks of 10 ms.
func cpu(b testing.TB, pid int) time.Duration {
	b.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+2:]))
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	if err1 != nil || err2 != nil {
		b.Fatal(err1, err2)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

// resident returns the resident memory of a process in bytes, and the part of
// it that is neither shared nor mapped from files.
func resident(b testing.TB, pid int) (all, anonymous float64) {
	b.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		kb, _ := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64)
		switch name {
		case "VmRSS":
			all = kb * 1024
		case "RssAnon":
			anonymous = kb * 1024
		}
	}
	return all, anonymous
}

// latencies collects how long operations took, and reports percentiles.
type latencies []time.Duration

func (l latencies) report(b *testing.B) {
	b.Helper()
	l.reportAs(b, "")
}

// reportAs is report with names that begin in a way.
func (l latencies) reportAs(b *testing.B, prefix string) {
	b.Helper()
	slices.Sort(l)
	at := func(p float64) float64 { return float64(l[int(p*float64(len(l)-1))]) / 1e6 }
	b.ReportMetric(at(0.50), prefix+"p50-ms")
	b.ReportMetric(at(0.99), prefix+"p99-ms")
	b.ReportMetric(at(1), prefix+"max-ms")
}

// perOp reports the CPU that a process used, per operation.
func perOp(b *testing.B, before, after time.Duration, operations int) float64 {
	b.Helper()
	ms := float64(after-before) / 1e6 / float64(operations)
	b.ReportMetric(ms, "cpu-ms/op")
	return ms
}

// raw is what the cryptography alone costs on this machine, now, in ms.
type raw struct{ sign, checkCSR float64 }

func measureRaw(b *testing.B) raw {
	b.Helper()
	key, csr := newCSR(b, "")
	digest := sha256.Sum256(csr)
	per := func(f func()) float64 {
		const n = 400
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		start := threadCPU(b)
		for range n {
			f()
		}
		return float64(threadCPU(b)-start) / 1e6 / n
	}
	return raw{
		sign: per(func() {
			if _, err := ecdsa.SignASN1(rand.Reader, key, digest[:]); err != nil {
				b.Fatal(err)
			}
		}),
		checkCSR: per(func() {
			parsed, err := x509.ParseCertificateRequest(csr)
			if err == nil {
				err = parsed.CheckSignature()
			}
			if err != nil {
				b.Fatal(err)
			}
		}),
	}
}

// threadCPU returns the CPU time that this thread has used: what others do on
// the machine does not count.
func threadCPU(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// emptyCall returns the CPU time that a process spends on a call of a method
// which it does not have: what gRPC alone costs here, now, in ms.
func emptyCall(b *testing.B, conn *grpc.ClientConn, pid int) float64 {
	b.Helper()
	const n = 4000
	before := cpu(b, pid)
	for range n {
		err := conn.Invoke(b.Context(), "/None/None", &emptypb.Empty{}, &emptypb.Empty{})
		if c := status.Code(err); c != codes.Unimplemented && c != codes.PermissionDenied {
			b.Fatal(err)
		}
	}
	return float64(cpu(b, pid)-before) / 1e6 / n
}

// newCSR makes a key and a CSR, for a SPIFFE ID if it is not empty.
func newCSR(b testing.TB, id string) (*ecdsa.PrivateKey, []byte) {
	b.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	template := &x509.CertificateRequest{Subject: pkix.Name{}}
	if id != "" {
		u, err := url.Parse(id)
		if err != nil {
			b.Fatal(err)
		}
		template.URIs = []*url.URL{u}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		b.Fatal(err)
	}
	return key, der
}

// BenchmarkFirstSVID is `hallmark dev` from its start to the printed SVID.
func BenchmarkFirstSVID(b *testing.B) {
	harness.Binary(b)
	var l latencies
	for b.Loop() {
		start := time.Now()
		dev := harness.Command{Args: []string{"dev", "--ephemeral", "--listen", "127.0.0.1:0"}}.Start(b)
		dev.WaitOutput(b, "export SPIFFE_ENDPOINT_SOCKET=")
		l = append(l, time.Since(start))
		dev.Stop(b)
	}
	l.report(b)
}

// BenchmarkIdleMemory is what a server and an agent with one entry and no
// client weigh. Of the resident memory, what is anonymous is their own; the
// rest is the program file and the store's mapped files.
func BenchmarkIdleMemory(b *testing.B) {
	d := harness.NewDomain(b, harness.Settings{})
	d.StartServer(b)
	d.StartAgent(b, d.Join(b))
	d.Entry(b, "/web", 1000)
	for b.Loop() {
	}
	for name, p := range map[string]*harness.Process{"server": d.Server, "agent": d.Agent} {
		all, anonymous := resident(b, p.PID())
		b.ReportMetric(all/1e6, name+"-MB")
		b.ReportMetric(anonymous/1e6, name+"-anon-MB")
	}
	b.ReportMetric(0, "ns/op")
}
