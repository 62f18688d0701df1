package harness

import (
	"net/http"
	"sync"
)

// cloudFaults has the services of a cloud answer otherwise than they do.
type cloudFaults struct {
	mu              sync.Mutex
	failing, broken http.HandlerFunc
}

// Fail has the metadata service answer otherwise; nil ends that.
func (f *cloudFaults) Fail(h http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failing = h
}

// Break has the APIs answer otherwise; nil ends that.
func (f *cloudFaults) Break(h http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.broken = h
}

// metadata is a metadata service that may fail.
func (f *cloudFaults) metadata(h http.HandlerFunc) http.Handler { return f.unless(&f.failing, h) }

// api is an API that may be broken.
func (f *cloudFaults) api(h http.HandlerFunc) http.Handler { return f.unless(&f.broken, h) }

func (f *cloudFaults) unless(fault *http.HandlerFunc, h http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		instead := *fault
		f.mu.Unlock()
		if instead == nil {
			instead = h
		}
		instead(w, r)
	})
}
