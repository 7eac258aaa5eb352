"""The Open Inference Protocol over gRPC, beside HTTP. It needs carso[grpc]."""
