package feed_test

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

func TestTheSpreadOfAChangeIsMeasuredUntilItsLastAcknowledgement(t *testing.T) {
	w := newWorld(t)
	slow := w.newAgent(w.node("slow"))
	slow.manual = true
	w.connect(slow)
	first := slow.next(0)[0].Revision
	acknowledged := func() uint64 {
		var m dto.Metric
		must(t, w.metrics.PushStep.Write(&m))
		return m.GetHistogram().GetSampleCount()
	}
	if w.feed.Behind() != 1 || acknowledged() != 0 || testutil.ToFloat64(w.metrics.Agents) != 1 {
		t.Errorf("before: %d behind, %d acknowledged, %v connected", w.feed.Behind(), acknowledged(), testutil.ToFloat64(w.metrics.Agents))
	}
	slow.toServ <- &hallmarkv1.FollowRequest{Revision: first}
	w.inStep()
	if w.feed.Behind() != 0 || acknowledged() != 1 {
		t.Errorf("after: %d behind, %d acknowledged", w.feed.Behind(), acknowledged())
	}
	must(t, slow.disconnect())
	if n := testutil.ToFloat64(w.metrics.Agents); n != 0 {
		t.Errorf("%v agents are connected after the last has gone", n)
	}
}
