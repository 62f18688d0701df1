package awsiid

import (
	"encoding/xml"
	"testing"
)

// FuzzAnswers feeds the readers of what AWS answers.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte(`{"Code": "Success", "AccessKeyId": "A", "SecretAccessKey": "s", "Expiration": "2027-01-01T00:00:00Z"}`))
	f.Add([]byte(`<DescribeInstancesResponse><reservationSet><item><instancesSet><item><instanceId>i-1</instanceId><blockDeviceMapping><item><ebs><attachTime>2027-01-01T00:00:00Z</attachTime></ebs></item></blockDeviceMapping></item></instancesSet></item></reservationSet></DescribeInstancesResponse>`))
	f.Add([]byte(`<Response><Errors><Error><Code>x</Code></Error></Errors></Response>`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if k, err := parseCredentials(data); err == nil && (k.id == "" || k.secret == "" || k.expires.IsZero()) {
			t.Errorf("took %q for credentials", data)
		}
		var d described
		if xml.Unmarshal(data, &d) == nil {
			for _, r := range d.Reservations {
				for i := range r.Instances {
					_ = r.Instances[i].checkRoot()
				}
			}
		}
		var e failure
		_ = xml.Unmarshal(data, &e)
	})
}

func TestEndpointsAreThoseOfThePartition(t *testing.T) {
	for _, c := range []struct{ service, region, endpoint, signed, partition string }{
		{"ec2", "eu-central-1", "https://ec2.eu-central-1.amazonaws.com", "eu-central-1", "aws"},
		{"sts", "cn-north-1", "https://sts.cn-north-1.amazonaws.com.cn", "cn-north-1", "aws-cn"},
		{"iam", "ap-south-2", "https://iam.amazonaws.com", "us-east-1", "aws"},
		{"iam", "us-gov-east-1", "https://iam.us-gov.amazonaws.com", "us-gov-west-1", "aws-us-gov"},
		{"ec2", "eusc-de-east-1", "https://ec2.eusc-de-east-1.amazonaws.eu", "eusc-de-east-1", "aws-eusc"},
	} {
		endpoint, signed := endpointOf(c.service, c.region)
		if endpoint != c.endpoint || signed != c.signed || partitionOf(c.region) != c.partition {
			t.Errorf("%s of %s is %s, signed for %s, in %s", c.service, c.region, endpoint, signed, partitionOf(c.region))
		}
	}
}
